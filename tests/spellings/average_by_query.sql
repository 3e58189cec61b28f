-- sample_id, avg: each validation sample with all of train.

==== CHEAP

-- comma
SELECT v.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY v.sample_id

-- JOIN, the other way round
SELECT v.sample_id AS query_id, avg(inner_product(v.gradient, t.gradient)) AS influence FROM validation v JOIN train t ON true GROUP BY 1

-- with the average
SELECT sample_id, inner_product(gradient, (SELECT avg(gradient) FROM train)) FROM validation

-- correlated
SELECT v.sample_id, (SELECT avg(inner_product(t.gradient, v.gradient)) FROM train t) FROM validation v

-- pairs in a CTE
WITH pairs AS (SELECT t.sample_id AS t, v.sample_id AS v, inner_product(t.gradient, v.gradient) AS s FROM train t, validation v)
SELECT v, avg(s) FROM pairs GROUP BY v

-- sum / count(*)
SELECT v.sample_id, sum(inner_product(t.gradient, v.gradient)) / count(*) FROM train t, validation v GROUP BY v.sample_id
