-- sample_id, avg: training samples with a loss over 1, validation samples of class 1.

==== CHEAP

-- WHERE
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v
WHERE v.label = 1 AND t.loss > 1 GROUP BY t.sample_id

-- parameters in the order of the text
-- with [1, 0.9999]
WITH q AS (SELECT gradient FROM validation WHERE label = ?)
SELECT t.sample_id, avg(inner_product(t.gradient, q.gradient)) FROM train t, q WHERE t.loss > ? AND t.loss <> 1 GROUP BY t.sample_id

-- ON
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t JOIN validation v ON v.label = 1 AND t.loss > 1 GROUP BY t.sample_id

-- some in ON, some in WHERE
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t JOIN validation v ON t.loss > 1 WHERE 1 = v.label GROUP BY t.sample_id

-- in sub-queries
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient))
FROM (SELECT * FROM train WHERE loss > 1) t, (FROM validation WHERE label = 1) v GROUP BY t.sample_id

-- in CTEs
WITH hard AS (SELECT * FROM train WHERE loss > 1), ones AS (SELECT gradient FROM validation WHERE label = 1)
SELECT sample_id, avg(inner_product(hard.gradient, ones.gradient)) FROM hard, ones GROUP BY sample_id

-- in views
CREATE OR REPLACE VIEW hard AS SELECT * FROM train WHERE loss > 1;
CREATE OR REPLACE VIEW ones AS SELECT * FROM validation WHERE label = 1;
SELECT hard.sample_id, avg(inner_product(hard.gradient, ones.gradient)) FROM hard, ones GROUP BY ALL

-- outside of the pairs
WITH pairs AS (
  SELECT t.sample_id AS id, t.loss, v.label AS class, inner_product(t.gradient, v.gradient) AS s FROM train t, validation v
)
SELECT id, avg(s) FROM pairs WHERE class = 1 AND loss > 1 GROUP BY id

-- in a sub-query's average
SELECT sample_id, inner_product(gradient, (SELECT avg(gradient) FROM validation WHERE label = 1)) FROM train WHERE loss > 1

-- in a correlated sub-query
SELECT sample_id, (SELECT avg(inner_product(t.gradient, v.gradient)) FROM validation v WHERE v.label = 1) FROM train t WHERE t.loss > 1

-- the result filtered by a key
SELECT id, s FROM (
  SELECT t.sample_id AS id, t.loss, avg(inner_product(t.gradient, v.gradient)) AS s FROM train t, validation v WHERE v.label = 1 GROUP BY ALL
) WHERE loss > 1

-- HAVING on a key
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v
WHERE v.label = 1 GROUP BY t.sample_id, t.loss HAVING t.loss > 1

-- HAVING on an aggregate of the training side
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v
WHERE v.label = 1 GROUP BY t.sample_id HAVING min(t.loss) > 1

-- positional parameters
-- with [1, 1.0]
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v WHERE v.label = ? AND t.loss > ? GROUP BY t.sample_id

-- numbered parameters
-- with [1.0, 1]
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v WHERE v.label = $2 AND t.loss > $1 GROUP BY t.sample_id

-- named parameters
-- with {'class': 1, 'least': 1.0}
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v WHERE v.label = $class AND t.loss > $least GROUP BY t.sample_id

-- IN and BETWEEN
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v
WHERE v.label IN (1) AND NOT t.loss BETWEEN 0 AND 1 GROUP BY t.sample_id

-- EXISTS, for the query side
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v
WHERE t.loss > 1 AND EXISTS (SELECT 1 FROM samples s WHERE s.split = 'validation' AND s.sample_id = v.sample_id AND s.label = 1)
GROUP BY t.sample_id

-- IN a sub-query, for either side
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v
WHERE t.sample_id IN (SELECT sample_id FROM train WHERE loss > 1) AND v.sample_id IN (SELECT sample_id FROM validation WHERE label = 1)
GROUP BY t.sample_id

-- SEMI JOIN
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient))
FROM (SELECT * FROM train SEMI JOIN (SELECT sample_id FROM train WHERE loss > 1) USING (sample_id)) t, (SELECT * FROM validation WHERE label = 1) v
GROUP BY t.sample_id

-- joined with a DataFrame of the wanted ones
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient))
FROM train t, validation v JOIN wanted w ON w.label = v.label WHERE t.loss > 1 GROUP BY t.sample_id

-- a variable in the list of classes
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v
WHERE v.label = (SELECT min(label) + 1 FROM train) AND t.loss > 1 GROUP BY t.sample_id

==== ANY COST

-- FILTER
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FILTER (WHERE v.label = 1) FROM train t, validation v WHERE t.loss > 1 GROUP BY t.sample_id

-- CASE inside the average
SELECT t.sample_id, avg(CASE WHEN v.label = 1 THEN inner_product(t.gradient, v.gradient) END) FROM train t, validation v WHERE t.loss > 1 GROUP BY t.sample_id
