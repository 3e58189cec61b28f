-- sample_id, avg, count(*), sum(t.loss), max(v.loss): an average beside what both sides say without gradients.

==== CHEAP

-- side by side
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)), count(*), sum(t.loss), max(v.loss) FROM train t, validation v GROUP BY t.sample_id

-- pairs in a CTE
WITH pairs AS (SELECT t.sample_id AS id, t.loss AS a, v.loss AS b, inner_product(t.gradient, v.gradient) AS s FROM train t, validation v)
SELECT id, avg(s), count(s), sum(a), max(b) FROM pairs GROUP BY id

-- two queries joined
SELECT a.id, a.s, b.n, b.total, b.most
FROM (SELECT t.sample_id AS id, avg(inner_product(t.gradient, v.gradient)) AS s FROM train t, validation v GROUP BY ALL) a
JOIN (SELECT t.sample_id AS id, count(*) AS n, sum(t.loss) AS total, max(v.loss) AS most FROM train t, validation v GROUP BY ALL) b USING (id)
