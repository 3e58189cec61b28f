-- sample_id, avg: weighted by the losses of both.

==== CHEAP

-- in front
SELECT t.sample_id, avg(t.loss * v.loss * inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY t.sample_id

-- behind
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient) * v.loss * t.loss) FROM train t, validation v GROUP BY t.sample_id

-- in brackets
SELECT t.sample_id, avg((t.loss * v.loss) * inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY t.sample_id

-- outside
SELECT t.sample_id, t.loss * avg(v.loss * inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY t.sample_id, t.loss

-- a weighted average of gradients
SELECT sample_id, loss * inner_product(gradient, (SELECT avg(loss * gradient) FROM validation)) FROM train

-- divided
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient) * t.loss / (1 / v.loss)) FROM train t, validation v GROUP BY t.sample_id

-- the weight in a sub-query
SELECT id, avg(w * s) FROM (
  SELECT t.sample_id AS id, t.loss * v.loss AS w, inner_product(t.gradient, v.gradient) AS s FROM train t, validation v
) GROUP BY id

-- the weight with a name of its own
SELECT t.sample_id, avg(t.loss * v.w * inner_product(t.gradient, v.gradient)) FROM train t, (SELECT gradient, loss AS w FROM validation) v GROUP BY t.sample_id

-- two minus signs
SELECT t.sample_id, avg(-t.loss * inner_product(t.gradient, v.gradient) * -v.loss) FROM train t, validation v GROUP BY t.sample_id

-- correlated
SELECT t.sample_id, (SELECT avg(t.loss * v.loss * inner_product(t.gradient, v.gradient)) FROM validation v) FROM train t

-- the losses joined in
SELECT g.sample_id, avg(o.loss * v.loss * inner_product(g.gradient, v.gradient))
FROM gradients g JOIN outputs o ON o.sample_id = g.sample_id AND o.split = g.split AND o.checkpoint = g.checkpoint, validation v
WHERE g.split = 'train' AND g.checkpoint = 2 GROUP BY g.sample_id
