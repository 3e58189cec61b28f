-- avg: all of train with all of validation, one number.

==== CHEAP

-- comma
SELECT avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v

-- of two averages
SELECT inner_product((SELECT avg(gradient) FROM train), (SELECT avg(gradient) FROM validation))

-- of two averages in CTEs
WITH a AS (SELECT avg(gradient) AS g FROM train), b AS (SELECT avg(gradient) AS g FROM validation)
SELECT inner_product(a.g, b.g) FROM a, b

-- an average of averages
SELECT avg(s) FROM (SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) AS s FROM train t, validation v GROUP BY t.sample_id)

-- an average of averages, over the other side
SELECT avg(s) FROM (SELECT v.sample_id, avg(inner_product(t.gradient, v.gradient)) AS s FROM train t, validation v GROUP BY v.sample_id)

-- of pairs
SELECT avg(s) FROM (SELECT inner_product(t.gradient, v.gradient) AS s FROM train t, validation v)

-- sum / count(*)
SELECT sum(inner_product(t.gradient, v.gradient)) / count(*) FROM train t CROSS JOIN validation v

-- an average of products with an average
SELECT avg(inner_product(t.gradient, (SELECT avg(gradient) FROM validation))) FROM train t

-- an average of correlated averages
SELECT avg((SELECT avg(inner_product(t.gradient, v.gradient)) FROM validation v)) FROM train t

-- a scalar sub-query
SELECT (SELECT avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v) AS both
