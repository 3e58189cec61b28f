-- sample_id, sum: TracIn; over checkpoints and validation, times the learning rate.

==== CHEAP

-- three joins
SELECT a.sample_id, sum(c.learning_rate * inner_product(a.gradient, b.gradient))
FROM gradients a JOIN gradients b ON a.checkpoint = b.checkpoint JOIN checkpoints c ON c.checkpoint = a.checkpoint
WHERE a.split = 'train' AND b.split = 'validation' GROUP BY a.sample_id

-- USING
SELECT a.sample_id, sum(c.learning_rate * inner_product(a.gradient, b.gradient)) AS tracin
FROM gradients a JOIN gradients b USING (checkpoint) JOIN checkpoints c USING (checkpoint)
WHERE a.split = 'train' AND b.split = 'validation' GROUP BY a.sample_id ORDER BY tracin

-- commas
SELECT a.sample_id, sum(inner_product(a.gradient, b.gradient) * c.learning_rate) FROM checkpoints c, gradients a, gradients b
WHERE a.checkpoint = c.checkpoint AND b.checkpoint = c.checkpoint AND a.split = 'train' AND b.split = 'validation' GROUP BY a.sample_id

-- splits in CTEs
WITH t AS (SELECT * FROM gradients WHERE split = 'train'), v AS (SELECT * FROM gradients WHERE split = 'validation')
SELECT t.sample_id, sum(learning_rate * inner_product(t.gradient, v.gradient))
FROM t JOIN v USING (checkpoint) JOIN checkpoints USING (checkpoint) GROUP BY t.sample_id

-- a sum for each checkpoint
WITH q AS (SELECT checkpoint, sum(gradient) AS g FROM gradients WHERE split = 'validation' GROUP BY checkpoint)
SELECT t.sample_id, sum(c.learning_rate * inner_product(t.gradient, q.g))
FROM gradients t JOIN q USING (checkpoint) JOIN checkpoints c USING (checkpoint) WHERE t.split = 'train' GROUP BY t.sample_id

-- a weighted sum for each checkpoint
WITH q AS (
  SELECT c.checkpoint, sum(c.learning_rate * v.gradient) AS g FROM gradients v JOIN checkpoints c USING (checkpoint)
  WHERE v.split = 'validation' GROUP BY c.checkpoint
)
SELECT t.sample_id, sum(inner_product(t.gradient, q.g)) FROM gradients t JOIN q USING (checkpoint) WHERE t.split = 'train' GROUP BY t.sample_id

-- by checkpoint first
SELECT id, sum(learning_rate * s) FROM (
  SELECT a.sample_id AS id, a.checkpoint, sum(inner_product(a.gradient, b.gradient)) AS s
  FROM gradients a JOIN gradients b ON a.checkpoint = b.checkpoint WHERE a.split = 'train' AND b.split = 'validation' GROUP BY ALL
) JOIN checkpoints USING (checkpoint) GROUP BY id

-- the rate from a scalar sub-query
SELECT a.sample_id, sum((SELECT learning_rate FROM checkpoints c WHERE c.checkpoint = a.checkpoint) * inner_product(a.gradient, b.gradient))
FROM gradients a JOIN gradients b USING (checkpoint) WHERE a.split = 'train' AND b.split = 'validation' GROUP BY a.sample_id

-- correlated over the query side
SELECT a.sample_id, sum(c.learning_rate * (
  SELECT sum(inner_product(a.gradient, b.gradient)) FROM gradients b WHERE b.split = 'validation' AND b.checkpoint = a.checkpoint))
FROM gradients a JOIN checkpoints c USING (checkpoint) WHERE a.split = 'train' GROUP BY a.sample_id

-- conditions in ON
SELECT t.sample_id, sum(c.learning_rate * inner_product(t.gradient, v.gradient))
FROM gradients t JOIN checkpoints c ON t.checkpoint = c.checkpoint AND t.split = 'train'
JOIN gradients v ON v.checkpoint = c.checkpoint AND v.split = 'validation' GROUP BY t.sample_id

-- only those with a checkpoint
SELECT a.sample_id, sum(c.learning_rate * inner_product(a.gradient, b.gradient))
FROM gradients a, gradients b, checkpoints c
WHERE a.split = 'train' AND b.split = 'validation' AND a.checkpoint = b.checkpoint AND a.checkpoint = c.checkpoint
  AND a.checkpoint IS NOT NULL AND a.step IS NULL GROUP BY a.sample_id
