-- sample_id, avg: the seven training samples that harm most.

==== CHEAP

-- ORDER BY the alias
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) AS s FROM train t, validation v GROUP BY ALL ORDER BY s LIMIT 7

-- ORDER BY the position
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY 1 ORDER BY 2 ASC LIMIT 7

-- ORDER BY the expression
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v
GROUP BY t.sample_id ORDER BY avg(inner_product(t.gradient, v.gradient)) LIMIT 7

-- ORDER BY minus the score
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) AS s FROM train t, validation v GROUP BY ALL ORDER BY -avg(inner_product(t.gradient, v.gradient)) DESC LIMIT 7

-- ORDER BY the correlated score
SELECT t.sample_id, (SELECT avg(inner_product(t.gradient, v.gradient)) FROM validation v) AS s FROM train t ORDER BY s LIMIT 7

-- QUALIFY
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) AS s FROM train t, validation v
GROUP BY t.sample_id QUALIFY row_number() OVER (ORDER BY s) <= 7

-- a rank in a sub-query
SELECT id, s FROM (
  SELECT t.sample_id AS id, avg(inner_product(t.gradient, v.gradient)) AS s, rank() OVER (ORDER BY avg(inner_product(t.gradient, v.gradient))) AS place
  FROM train t, validation v GROUP BY t.sample_id
) WHERE place <= 7

-- a CTE and a LIMIT outside
WITH scores AS (SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) AS s FROM train t, validation v GROUP BY ALL)
SELECT * FROM scores ORDER BY s LIMIT 7

-- joined with the samples for their labels
WITH worst AS (
  SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) AS s FROM train t, validation v GROUP BY ALL ORDER BY s LIMIT 7
)
SELECT w.sample_id, w.s FROM worst w JOIN samples x ON x.sample_id = w.sample_id AND x.split = 'train'

-- the score used twice in a CTE
WITH scores AS (SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) AS s FROM train t, validation v GROUP BY ALL)
SELECT sample_id, s FROM scores WHERE s <= (SELECT max(s) FROM (SELECT s FROM scores ORDER BY s LIMIT 7))

-- a semi-join on the ids
SELECT t.sample_id, inner_product(t.gradient, (SELECT avg(gradient) FROM validation)) FROM train t WHERE t.sample_id IN (
  SELECT t.sample_id FROM train t, validation v GROUP BY t.sample_id ORDER BY avg(inner_product(t.gradient, v.gradient)) LIMIT 7
)

-- LIMIT by a parameter
-- with [7]
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) AS s FROM train t, validation v GROUP BY ALL ORDER BY s LIMIT ?
