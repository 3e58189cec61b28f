-- label, avg: each class of train, NULL among them, with all of validation.

==== CHEAP

-- comma
SELECT t.label, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY t.label

-- averages of averages by class
SELECT label, avg(s) FROM (
  SELECT t.sample_id, t.label, avg(inner_product(t.gradient, v.gradient)) AS s FROM train t, validation v GROUP BY ALL
) GROUP BY label

-- of class means
WITH means AS (SELECT label, avg(gradient) AS g FROM train GROUP BY label)
SELECT label, inner_product(g, (SELECT avg(gradient) FROM validation)) FROM means

-- of class means, in the SELECT itself
SELECT label, inner_product(avg(gradient), (SELECT avg(gradient) FROM validation)) FROM train GROUP BY label

-- pairs outside
SELECT class, avg(s) FROM (SELECT t.label AS class, inner_product(t.gradient, v.gradient) AS s FROM train t, validation v) GROUP BY class

-- correlated, averaged
SELECT label, avg((SELECT avg(inner_product(t.gradient, v.gradient)) FROM validation v)) FROM train t GROUP BY label

-- labels joined in
SELECT s.label, avg(inner_product(g.gradient, v.gradient)) FROM gradients g JOIN samples s USING (sample_id, split), validation v
WHERE g.split = 'train' AND g.checkpoint = 2 GROUP BY s.label
