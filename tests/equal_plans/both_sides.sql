-- Both sides in groups.

==== all with all

-- comma
SELECT avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v

-- JOIN
SELECT avg(inner_product(t.gradient, v.gradient)) FROM validation v JOIN train t ON true

-- pairs in a sub-query
SELECT avg(s) FROM (SELECT inner_product(t.gradient, v.gradient) AS s FROM train t, validation v)

-- an average of products with an average
SELECT avg(inner_product(t.gradient, (SELECT avg(gradient) FROM validation))) FROM train t

-- a scalar sub-query
SELECT x.s FROM (SELECT avg(inner_product(t.gradient, v.gradient)) AS s FROM train t, validation v) x

-- b2b
SELECT influence FROM b2b()

==== class by class

-- GROUP BY ALL
SELECT t.label, v.label, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY ALL

-- positions, and a JOIN
SELECT t.label AS a, v.label AS b, avg(inner_product(t.gradient, v.gradient)) AS s FROM train t JOIN validation v ON true GROUP BY 1, 2

-- pairs in a CTE
WITH pairs AS (SELECT t.label AS a, v.label AS b, inner_product(t.gradient, v.gradient) AS s FROM train t, validation v)
SELECT a, b, avg(s) FROM pairs GROUP BY a, b

==== over checkpoints

-- ON
SELECT a.sample_id, sum(c.learning_rate * inner_product(a.gradient, b.gradient))
FROM gradients a JOIN gradients b ON a.checkpoint = b.checkpoint JOIN checkpoints c ON a.checkpoint = c.checkpoint
WHERE a.split = 'train' AND b.split = 'validation' GROUP BY a.sample_id

-- USING
SELECT a.sample_id, sum(c.learning_rate * inner_product(a.gradient, b.gradient))
FROM gradients a JOIN gradients b USING (checkpoint) JOIN checkpoints c USING (checkpoint)
WHERE a.split = 'train' AND b.split = 'validation' GROUP BY a.sample_id

-- splits in CTEs
WITH t AS (FROM gradients a WHERE a.split = 'train'), v AS (FROM gradients b WHERE b.split = 'validation')
SELECT t.sample_id, sum(learning_rate * inner_product(t.gradient, v.gradient))
FROM t JOIN v USING (checkpoint) JOIN checkpoints c USING (checkpoint) GROUP BY t.sample_id
