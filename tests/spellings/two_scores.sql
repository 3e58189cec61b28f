-- sample_id, avg, avg over class 1: two scores of each training sample.

==== CHEAP

-- two CTEs
WITH a AS (SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) AS s FROM train t, validation v GROUP BY ALL),
     b AS (SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) AS s FROM train t, validation v WHERE v.label = 1 GROUP BY ALL)
SELECT sample_id, a.s, b.s FROM a JOIN b USING (sample_id)

-- two averages
SELECT sample_id, inner_product(gradient, (SELECT avg(gradient) FROM validation)), inner_product(gradient, (SELECT avg(gradient) FROM validation WHERE label = 1))
FROM train

-- two correlated sub-queries
SELECT t.sample_id, (SELECT avg(inner_product(t.gradient, v.gradient)) FROM validation v), (SELECT avg(inner_product(t.gradient, v.gradient)) FROM validation v WHERE v.label = 1)
FROM train t

-- a CTE of averages, used twice
WITH q AS (SELECT avg(gradient) AS g, avg(gradient) FILTER (WHERE label = 1) AS h FROM validation)
SELECT t.sample_id, inner_product(t.gradient, q.g), inner_product(t.gradient, q.h) FROM train t, q

==== ANY COST

-- FILTER
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)), avg(inner_product(t.gradient, v.gradient)) FILTER (WHERE v.label = 1)
FROM train t, validation v GROUP BY t.sample_id
