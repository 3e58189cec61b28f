-- sample_id, avg: each training sample with the validation samples of its class.

==== CHEAP

-- WHERE
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v WHERE t.label = v.label GROUP BY t.sample_id

-- ON
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t JOIN validation v ON v.label = t.label GROUP BY t.sample_id

-- USING
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t JOIN validation v USING (label) GROUP BY t.sample_id

-- class means
WITH means AS (SELECT label, avg(gradient) AS g FROM validation GROUP BY label)
SELECT t.sample_id, inner_product(t.gradient, m.g) FROM train t JOIN means m USING (label)

-- class means in a derived table
SELECT t.sample_id, inner_product(t.gradient, m.g) FROM train t, (SELECT label, avg(gradient) AS g FROM validation GROUP BY 1) m WHERE m.label = t.label

-- correlated, the others dropped
SELECT * FROM (
  SELECT t.sample_id, (SELECT avg(inner_product(t.gradient, v.gradient)) FROM validation v WHERE v.label = t.label) AS s FROM train t
) WHERE s IS NOT NULL

-- pairs with their labels
SELECT id, avg(s) FROM (
  SELECT t.sample_id AS id, t.label AS a, v.label AS b, inner_product(t.gradient, v.gradient) AS s FROM train t, validation v
) WHERE a = b GROUP BY id

-- by sample and class, then the own class
SELECT id, s FROM (
  SELECT t.sample_id AS id, t.label AS a, v.label AS b, avg(inner_product(t.gradient, v.gradient)) AS s FROM train t, validation v GROUP BY ALL
) WHERE a = b
