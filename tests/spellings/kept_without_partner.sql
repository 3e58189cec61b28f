-- sample_id, avg: with the validation samples of its class; NULL without one.

==== ANY COST

-- LEFT JOIN
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t LEFT JOIN validation v ON t.label = v.label GROUP BY t.sample_id

-- RIGHT JOIN
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM validation v RIGHT JOIN train t USING (label) GROUP BY t.sample_id

-- LEFT JOIN of class means
WITH means AS (SELECT label, avg(gradient) AS g FROM validation GROUP BY label)
SELECT t.sample_id, inner_product(t.gradient, m.g) FROM train t LEFT JOIN means m USING (label)

-- correlated
SELECT t.sample_id, (SELECT avg(inner_product(t.gradient, v.gradient)) FROM validation v WHERE v.label = t.label) FROM train t
