-- Each sample of one side with all of the other: one vector, and a product for each sample.

==== every training sample

-- comma
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY t.sample_id

-- CROSS JOIN
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t CROSS JOIN validation v GROUP BY t.sample_id

-- JOIN ON true
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t JOIN validation v ON true GROUP BY t.sample_id

-- the arguments the other way round, and the relations
SELECT t.sample_id, avg(inner_product(v.gradient, t.gradient)) FROM validation v, train t GROUP BY t.sample_id

-- GROUP BY ALL
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY ALL

-- GROUP BY a position
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY 1

-- GROUP BY an alias
SELECT t.sample_id AS id, mean(inner_product(t.gradient, v.gradient)) AS influence FROM train t, validation v GROUP BY id

-- FROM first
FROM train t, validation v SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) GROUP BY t.sample_id

-- no aliases
SELECT train.sample_id, avg(inner_product(train.gradient, validation.gradient)) FROM train, validation GROUP BY train.sample_id

-- other cases
select "T".sample_id, Avg(INNER_PRODUCT("T".gradient, v.Gradient)) from Train "T", validation v group by "T".sample_id

-- the average in a scalar sub-query
SELECT t.sample_id, inner_product(t.gradient, (SELECT avg(v.gradient) FROM validation v)) FROM train t

-- unqualified
SELECT sample_id, inner_product(gradient, (SELECT avg(gradient) FROM validation)) FROM train

-- the average in a derived table
SELECT t.sample_id, inner_product(t.gradient, m.g) FROM train t, (SELECT avg(gradient) AS g FROM validation) m

-- the average in a CTE
WITH m AS (SELECT avg(gradient) AS g FROM validation) SELECT t.sample_id, inner_product(t.gradient, m.g) FROM train t CROSS JOIN m

-- the average in a view
CREATE OR REPLACE VIEW direction AS SELECT avg(gradient) AS g FROM validation;
SELECT t.sample_id, inner_product(t.gradient, d.g) FROM train t, direction d

-- correlated
SELECT t.sample_id, (SELECT avg(inner_product(t.gradient, v.gradient)) FROM validation v) FROM train t

-- LATERAL
SELECT t.sample_id, x.s FROM train t, LATERAL (SELECT avg(inner_product(t.gradient, v.gradient)) AS s FROM validation v) x

-- LATERAL, unsaid
SELECT t.sample_id, x.s FROM train t JOIN (SELECT avg(inner_product(t.gradient, v.gradient)) AS s FROM validation v) x ON true

-- LATERAL of single pairs, averaged outside
SELECT t.sample_id, avg(x.s) FROM train t, LATERAL (SELECT inner_product(t.gradient, v.gradient) AS s FROM validation v) x GROUP BY t.sample_id

-- pairs in a sub-query
SELECT id, avg(s) FROM (SELECT t.sample_id AS id, inner_product(t.gradient, v.gradient) AS s FROM train t, validation v) GROUP BY id

-- pairs in a CTE
WITH pairs AS (SELECT t.sample_id AS id, inner_product(t.gradient, v.gradient) AS s FROM train t, validation v)
SELECT id, avg(s) FROM pairs GROUP BY id

-- pairs in a view
CREATE OR REPLACE VIEW every_pair AS
SELECT t.sample_id AS id, inner_product(t.gradient, v.gradient) AS s FROM train t, validation v;
SELECT id, avg(s) FROM every_pair GROUP BY id

-- two sub-queries deep
SELECT id, avg(s) FROM (SELECT id, inner_product(g, h) AS s FROM (
  SELECT t.sample_id AS id, t.gradient AS g, v.gradient AS h FROM train t, validation v)) GROUP BY id

-- both sides in CTEs
WITH a AS (SELECT sample_id, gradient FROM train), b AS (SELECT gradient FROM validation)
SELECT a.sample_id, avg(inner_product(a.gradient, b.gradient)) FROM a, b GROUP BY a.sample_id

-- inside another query
SELECT q.id, q.s FROM (
  SELECT t.sample_id AS id, avg(inner_product(t.gradient, v.gradient)) AS s FROM train t, validation v GROUP BY t.sample_id) q

-- a cast around it
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient))::DOUBLE FROM train t, validation v GROUP BY t.sample_id

-- p2b
SELECT sample_id, influence FROM p2b()

-- p2b with its arguments
SELECT * FROM p2b(train := 'train', query := 'SELECT sample_id, gradient FROM validation')

==== every training sample, summed

-- sum
SELECT t.sample_id, sum(inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY t.sample_id

-- sum / count(*)
SELECT t.sample_id, sum(inner_product(t.gradient, v.gradient)) / count(*) FROM train t, validation v GROUP BY t.sample_id

-- sum / count(*), correlated
SELECT t.sample_id, (SELECT sum(inner_product(t.gradient, v.gradient)) / count(*) FROM validation v) FROM train t

-- sum / the number of the others
SELECT t.sample_id, sum(inner_product(t.gradient, v.gradient)) / (SELECT count(*) FROM validation)
FROM train t, validation v GROUP BY t.sample_id

-- the sum in a scalar sub-query
SELECT sample_id, inner_product(gradient, (SELECT sum(gradient) FROM validation)) / 40 FROM train

==== every validation sample

-- comma
SELECT v.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY v.sample_id

-- JOIN, the other way round
SELECT v.sample_id, avg(inner_product(v.gradient, t.gradient)) FROM validation v JOIN train t ON true GROUP BY 1

-- the average in a scalar sub-query
SELECT sample_id, inner_product(gradient, (SELECT avg(gradient) FROM train)) FROM validation

-- correlated
SELECT v.sample_id, (SELECT avg(inner_product(t.gradient, v.gradient)) FROM train t) FROM validation v

-- pairs in a CTE
WITH pairs AS (SELECT v.sample_id AS v, inner_product(t.gradient, v.gradient) AS s FROM train t, validation v)
SELECT v, avg(s) FROM pairs GROUP BY v

-- b2p
SELECT query_id, influence FROM b2p()
