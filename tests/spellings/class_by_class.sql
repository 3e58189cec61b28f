-- label, label, avg: classes of train with classes of validation, NULL among them.

==== CHEAP

-- GROUP BY ALL
SELECT t.label, v.label, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY ALL

-- GROUP BY positions
SELECT t.label AS a, v.label AS b, avg(inner_product(t.gradient, v.gradient)) AS s FROM train t JOIN validation v ON true GROUP BY 1, 2 ORDER BY 1, 2

-- class means
WITH a AS (SELECT label, avg(gradient) AS g FROM train GROUP BY label), b AS (SELECT label, avg(gradient) AS g FROM validation GROUP BY label)
SELECT a.label, b.label, inner_product(a.g, b.g) FROM a, b

-- class means of the query side alone
SELECT t.label, m.label, avg(inner_product(t.gradient, m.g))
FROM train t, (SELECT label, avg(gradient) AS g FROM validation GROUP BY label) m GROUP BY t.label, m.label

-- pairs in a CTE
WITH pairs AS (SELECT t.label AS a, v.label AS b, inner_product(t.gradient, v.gradient) AS s FROM train t, validation v)
SELECT a, b, avg(s) FROM pairs GROUP BY a, b

-- sum / count(*)
SELECT t.label, v.label, sum(inner_product(t.gradient, v.gradient)) / count(*) FROM train t, validation v GROUP BY t.label, v.label
