-- Conditions on one side go along with it, wherever they are said.

==== hard training samples with class 1

-- WHERE
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v
WHERE t.loss > 1 AND v.label = 1 GROUP BY t.sample_id

-- ON
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t JOIN validation v ON v.label = 1 AND t.loss > 1
GROUP BY t.sample_id

-- some in ON, some in WHERE
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t JOIN validation v ON t.loss > 1
WHERE v.label = 1 GROUP BY t.sample_id

-- in sub-queries
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient))
FROM (SELECT * FROM train WHERE loss > 1) t, (FROM validation WHERE label = 1) v GROUP BY t.sample_id

-- in CTEs
WITH hard AS (SELECT * FROM train WHERE loss > 1), ones AS (SELECT gradient FROM validation WHERE label = 1)
SELECT sample_id, avg(inner_product(hard.gradient, ones.gradient)) FROM hard, ones GROUP BY sample_id

-- in views
CREATE OR REPLACE VIEW hard AS SELECT sample_id, gradient FROM train WHERE loss > 1;
CREATE OR REPLACE VIEW ones AS SELECT gradient FROM validation WHERE label = 1;
SELECT hard.sample_id, avg(inner_product(hard.gradient, ones.gradient)) FROM hard, ones GROUP BY ALL

-- outside of the pairs
WITH pairs AS (
  SELECT t.sample_id AS id, t.loss, v.label AS class, inner_product(t.gradient, v.gradient) AS s FROM train t, validation v
)
SELECT id, avg(s) FROM pairs WHERE loss > 1 AND class = 1 GROUP BY id

-- in the average's sub-query
SELECT sample_id, inner_product(gradient, (SELECT avg(gradient) FROM validation WHERE label = 1)) FROM train WHERE loss > 1

-- in a correlated sub-query
SELECT sample_id, (SELECT avg(inner_product(t.gradient, v.gradient)) FROM validation v WHERE v.label = 1) FROM train t WHERE t.loss > 1

-- p2b
SELECT sample_id, influence FROM p2b('SELECT * FROM train WHERE loss > 1', 'FROM validation WHERE label = 1')

==== samples with their own class

-- WHERE
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v WHERE t.label = v.label GROUP BY t.sample_id

-- ON
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t JOIN validation v ON t.label = v.label GROUP BY t.sample_id

-- USING
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t JOIN validation v USING (label) GROUP BY t.sample_id

-- pairs with their labels
SELECT id, avg(s) FROM (
  SELECT t.sample_id AS id, t.label AS a, v.label AS b, inner_product(t.gradient, v.gradient) AS s FROM train t, validation v
) WHERE a = b GROUP BY id

==== the weights of both sides

-- in front
SELECT t.sample_id, avg(t.loss * v.loss * inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY t.sample_id

-- behind
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient) * v.loss * t.loss) FROM train t, validation v GROUP BY t.sample_id

-- in brackets
SELECT t.sample_id, avg((t.loss * v.loss) * inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY t.sample_id

-- at the gradients
SELECT t.sample_id, avg(inner_product(t.loss * t.gradient, v.loss * v.gradient)) FROM train t, validation v GROUP BY t.sample_id

-- in a sub-query
SELECT id, avg(w * s) FROM (
  SELECT t.sample_id AS id, t.loss * v.loss AS w, inner_product(t.gradient, v.gradient) AS s FROM train t, validation v
) GROUP BY id

-- correlated
SELECT t.sample_id, (SELECT avg(t.loss * v.loss * inner_product(t.gradient, v.gradient)) FROM validation v) FROM train t

==== some layers

-- at the training gradient
SELECT t.sample_id, avg(inner_product(layers(t.gradient, 'fc1'), v.gradient)) FROM train t, validation v GROUP BY t.sample_id

-- at the other
SELECT t.sample_id, avg(inner_product(t.gradient, layers(v.gradient, 'fc1'))) FROM train t, validation v GROUP BY t.sample_id

-- in a sub-query
SELECT t.sample_id, avg(inner_product(g, v.gradient))
FROM (SELECT sample_id, layers(gradient, 'fc1') AS g FROM train) t, validation v GROUP BY t.sample_id

-- p2b
SELECT sample_id, influence FROM p2b(layers := 'fc1')
