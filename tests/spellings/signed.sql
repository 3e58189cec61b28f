-- sample_id, sum: validation samples predicted rightly count as they are, the others negated.

==== CHEAP

-- CASE as a weight
SELECT t.sample_id, sum(CASE WHEN v.prediction = v.label THEN 1 ELSE -1 END * inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY t.sample_id

-- if as a weight
SELECT t.sample_id, sum(inner_product(t.gradient, v.gradient) * if(v.prediction = v.label, 1, -1)) FROM train t, validation v GROUP BY t.sample_id

-- in a sub-query
SELECT t.sample_id, sum(v.sign * inner_product(t.gradient, v.gradient))
FROM train t, (SELECT *, CASE WHEN prediction = label THEN 1 ELSE -1 END AS sign FROM validation) v GROUP BY t.sample_id

-- a sum of gradients
SELECT sample_id, inner_product(gradient, (SELECT sum(CASE WHEN prediction = label THEN 1 ELSE -1 END * gradient) FROM validation)) FROM train

==== ANY COST

-- CASE around the products
SELECT t.sample_id, sum(CASE WHEN v.prediction = v.label THEN inner_product(t.gradient, v.gradient) ELSE -inner_product(t.gradient, v.gradient) END)
FROM train t, validation v GROUP BY t.sample_id
