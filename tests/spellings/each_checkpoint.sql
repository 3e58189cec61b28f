-- sample_id, checkpoint, avg: each training sample at each checkpoint.

==== CHEAP

-- JOIN
SELECT a.sample_id, a.checkpoint, avg(inner_product(a.gradient, b.gradient)) FROM gradients a JOIN gradients b ON a.checkpoint = b.checkpoint
WHERE a.split = 'train' AND b.split = 'validation' GROUP BY ALL

-- USING
SELECT a.sample_id, checkpoint, avg(inner_product(a.gradient, b.gradient)) FROM gradients a JOIN gradients b USING (checkpoint)
WHERE a.split = 'train' AND b.split = 'validation' GROUP BY a.sample_id, checkpoint

-- averages
WITH q AS (SELECT checkpoint, avg(gradient) AS g FROM gradients WHERE split = 'validation' GROUP BY checkpoint)
SELECT t.sample_id, checkpoint, inner_product(t.gradient, q.g) FROM gradients t JOIN q USING (checkpoint) WHERE t.split = 'train'
