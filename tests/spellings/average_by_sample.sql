-- sample_id, avg: each training sample with all of validation.

==== CHEAP

-- comma
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY t.sample_id

-- GROUP BY ALL, ORDER BY the alias
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) AS influence
FROM train t, validation v GROUP BY ALL ORDER BY influence

-- CROSS JOIN, AS, arguments the other way round
SELECT t.sample_id, AVG(inner_product(v.gradient, t.gradient)) AS influence
FROM train AS t CROSS JOIN validation AS v GROUP BY t.sample_id

-- JOIN ON true
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t JOIN validation v ON true GROUP BY 1

-- INNER JOIN ON 1 = 1, lower case, position
select t.sample_id, avg(inner_product(t.gradient, v.gradient)) from train t inner join validation v on 1 = 1 group by 1

-- no aliases
SELECT train.sample_id, avg(inner_product(train.gradient, validation.gradient)) FROM train, validation GROUP BY train.sample_id

-- the query side first
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM validation v, train t GROUP BY t.sample_id

-- FROM first
FROM train t, validation v SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) GROUP BY t.sample_id

-- quoted and mixed-case names
SELECT T."sample_id", Avg(Inner_Product("T".Gradient, "the others".gradient)) AS "My Score"
FROM Train "t", Validation "the others" GROUP BY "T".sample_id

-- mean
SELECT t.sample_id, mean(inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY t.sample_id

-- sum / count(*)
SELECT t.sample_id, sum(inner_product(t.gradient, v.gradient)) / count(*) FROM train t, validation v GROUP BY t.sample_id

-- sum / count of the product
SELECT t.sample_id, sum(inner_product(t.gradient, v.gradient)) / count(inner_product(t.gradient, v.gradient))
FROM train t, validation v GROUP BY t.sample_id

-- sum / the size of validation
SELECT t.sample_id, sum(inner_product(t.gradient, v.gradient)) / (SELECT count(*) FROM validation)
FROM train t, validation v GROUP BY t.sample_id

-- sum of products divided inside
SELECT t.sample_id, sum(inner_product(t.gradient, v.gradient) / 40) FROM train t, validation v GROUP BY t.sample_id

-- arithmetic around the average
SELECT t.sample_id, 1.0 * avg(inner_product(t.gradient, v.gradient)) + 0 FROM train t, validation v GROUP BY t.sample_id

-- arithmetic inside the average
SELECT t.sample_id, -avg(-1.0 * inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY t.sample_id

-- a cast around it
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient))::DOUBLE FROM train t, validation v GROUP BY t.sample_id

-- a cast inside it
SELECT t.sample_id, avg(CAST(inner_product(t.gradient, v.gradient) AS DOUBLE)) FROM train t, validation v GROUP BY t.sample_id

-- both sides are sub-queries
SELECT a.id, avg(inner_product(a.g, b.h))
FROM (SELECT sample_id AS id, gradient AS g FROM train) a, (SELECT gradient AS h FROM validation) b GROUP BY a.id

-- unqualified names
SELECT id, avg(inner_product(g, h))
FROM (SELECT sample_id AS id, gradient AS g FROM train), (SELECT gradient AS h FROM validation) GROUP BY id

-- column aliases of a table alias
SELECT a.id, avg(inner_product(a.g, b.h))
FROM (SELECT sample_id, gradient FROM train) a(id, g), (SELECT gradient FROM validation) b(h) GROUP BY a.id

-- two CTEs
WITH a AS (SELECT sample_id, gradient FROM train), b AS (SELECT gradient FROM validation)
SELECT a.sample_id, avg(inner_product(a.gradient, b.gradient)) FROM a, b GROUP BY a.sample_id

-- CTEs with column names, one of them materialized
WITH a(id, g) AS (SELECT sample_id, gradient FROM train), b(h) AS MATERIALIZED (SELECT gradient FROM validation)
SELECT id, avg(inner_product(g, h)) AS score FROM a CROSS JOIN b GROUP BY id

-- pairs in a sub-query, averaged outside
SELECT sample_id, avg(s) FROM (
  SELECT t.sample_id, inner_product(t.gradient, v.gradient) AS s FROM train t, validation v
) GROUP BY sample_id

-- pairs in a CTE, averaged outside
WITH pairs AS (
  SELECT t.sample_id AS train_id, v.sample_id AS query_id, inner_product(t.gradient, v.gradient) AS influence
  FROM train t CROSS JOIN validation v
)
SELECT train_id, avg(influence) AS influence FROM pairs GROUP BY train_id ORDER BY influence DESC

-- pairs in a view of the user's, averaged outside
CREATE OR REPLACE VIEW every_pair AS
SELECT t.sample_id AS id, v.sample_id AS other, inner_product(t.gradient, v.gradient) AS score FROM train t, validation v;
SELECT id, avg(score) FROM every_pair GROUP BY id

-- sides in views of the user's
CREATE OR REPLACE VIEW left_side AS SELECT sample_id, gradient FROM train;
CREATE OR REPLACE VIEW right_side AS SELECT * FROM validation;
SELECT l.sample_id, avg(inner_product(l.gradient, r.gradient)) FROM left_side l, right_side r GROUP BY l.sample_id

-- the whole question in a view
CREATE OR REPLACE VIEW influences AS
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) AS influence FROM train t, validation v GROUP BY t.sample_id;
SELECT * FROM influences ORDER BY influence

-- inner product with the average, a scalar sub-query
SELECT t.sample_id, inner_product(t.gradient, (SELECT avg(v.gradient) FROM validation v)) FROM train t

-- inner product with the average, unqualified
SELECT sample_id, inner_product(gradient, (SELECT avg(gradient) FROM validation)) AS influence FROM train ORDER BY 2

-- inner product with the average, a derived table
SELECT t.sample_id, inner_product(t.gradient, m.g) FROM train t, (SELECT avg(gradient) AS g FROM validation) m

-- inner product with the average, a CTE
WITH m AS (SELECT avg(gradient) AS g FROM validation)
SELECT t.sample_id, inner_product(t.gradient, m.g) AS influence FROM train t CROSS JOIN m

-- inner product with the average in a CTE, read by a sub-query
WITH m AS (SELECT avg(gradient) AS g FROM validation)
SELECT sample_id, inner_product(gradient, (SELECT g FROM m)) FROM train

-- inner product with the average, in a view
CREATE OR REPLACE VIEW direction AS SELECT avg(gradient) AS g FROM validation;
SELECT t.sample_id, inner_product(t.gradient, d.g) FROM train t, direction d

-- inner product with the average, in a table
CREATE OR REPLACE TABLE kept_direction AS SELECT avg(gradient) AS g FROM validation;
SELECT t.sample_id, inner_product(t.gradient, d.g) FROM train t, kept_direction d

-- sum of gradients divided by their number outside
SELECT sample_id, inner_product(gradient, (SELECT sum(gradient) FROM validation)) / 40 FROM train

-- a needless average of one product
SELECT t.sample_id, avg(inner_product(t.gradient, m.g)) FROM train t, (SELECT avg(gradient) AS g FROM validation) m GROUP BY t.sample_id

-- the average of the training sample's own gradient, grouped
SELECT t.sample_id, inner_product(avg(t.gradient), (SELECT avg(gradient) FROM validation)) FROM train t GROUP BY t.sample_id

-- inner product of two averages in one SELECT over pairs
SELECT t.sample_id, inner_product(avg(t.gradient), avg(v.gradient)) FROM train t, validation v GROUP BY t.sample_id

-- correlated scalar sub-query
SELECT t.sample_id, (SELECT avg(inner_product(t.gradient, v.gradient)) FROM validation v) FROM train t

-- correlated scalar sub-query, sum / count(*)
SELECT t.sample_id, (SELECT sum(inner_product(t.gradient, v.gradient)) / count(*) FROM validation v) AS influence FROM train t ORDER BY influence

-- correlated scalar sub-query, only the outer gradient qualified
SELECT sample_id, (SELECT avg(inner_product(train.gradient, v.gradient)) FROM validation v) FROM train

-- LATERAL with a comma
SELECT t.sample_id, x.s FROM train t, LATERAL (SELECT avg(inner_product(t.gradient, v.gradient)) AS s FROM validation v) x

-- LATERAL join, unnamed word
SELECT t.sample_id, x.s FROM train t CROSS JOIN (SELECT avg(inner_product(t.gradient, v.gradient)) AS s FROM validation v) x

-- LEFT JOIN LATERAL ON true
SELECT t.sample_id, s FROM train t LEFT JOIN LATERAL (SELECT avg(inner_product(t.gradient, v.gradient)) AS s FROM validation v) x ON true

-- from the relation of all gradients
SELECT a.sample_id, avg(inner_product(a.gradient, b.gradient)) FROM gradients a, gradients b
WHERE a.split = 'train' AND b.split = 'validation' AND a.checkpoint = 2 AND b.checkpoint = 2 GROUP BY a.sample_id

-- from the relation of all gradients, the newest checkpoint asked for
SELECT a.sample_id, avg(inner_product(a.gradient, b.gradient)) FROM gradients a JOIN gradients b USING (checkpoint)
WHERE a.split = 'train' AND b.split = 'validation' AND checkpoint = (SELECT max(checkpoint) FROM checkpoints) GROUP BY a.sample_id

-- grouped by what the sample determines
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY t.sample_id, t.label, t.loss

-- key is an expression
SELECT t.sample_id + 0 AS id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY id

-- with a HAVING that keeps all
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) AS s FROM train t, validation v GROUP BY t.sample_id HAVING s > -1e9

-- HAVING count(*)
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY t.sample_id HAVING count(*) > 0

-- DISTINCT of a result
SELECT DISTINCT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY t.sample_id

-- with what the store knows of the samples
SELECT s.sample_id, avg(inner_product(t.gradient, v.gradient))
FROM train t JOIN samples s ON s.sample_id = t.sample_id AND s.split = 'train' CROSS JOIN validation v GROUP BY s.sample_id

-- NULLs spelled out
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v
WHERE t.gradient IS NOT NULL AND v.gradient IS NOT NULL GROUP BY t.sample_id

-- coalesce
SELECT t.sample_id, coalesce(avg(inner_product(t.gradient, v.gradient)), 0) FROM train t, validation v GROUP BY t.sample_id

-- rounded not at all
SELECT t.sample_id, round(avg(inner_product(t.gradient, v.gradient)), 9) FROM train t, validation v GROUP BY t.sample_id

-- in two halves
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v WHERE t.sample_id < 30 GROUP BY 1
UNION ALL
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v WHERE t.sample_id >= 30 GROUP BY 1

-- into a table
CREATE OR REPLACE TABLE scores AS
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) AS s FROM train t, validation v GROUP BY t.sample_id;
FROM scores

-- comments
SELECT t.sample_id, /* not avg(DISTINCT */ avg(inner_product(t.gradient, v.gradient)) -- it's bilinear
FROM train t, validation v GROUP BY t.sample_id;

-- a sub-query's ORDER BY
SELECT * FROM (SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) AS s FROM train t, validation v GROUP BY ALL ORDER BY s) q

-- the layers all named
SELECT t.sample_id, avg(inner_product(layers(t.gradient, '*'), v.gradient)) FROM train t, validation v GROUP BY t.sample_id

-- a sum over parts of the gradient
SELECT t.sample_id, avg(inner_product(layers(t.gradient, 'fc1'), v.gradient) + inner_product(layers(t.gradient, 'block'), v.gradient)
  + inner_product(layers(t.gradient, 'head'), v.gradient))
FROM train t, validation v GROUP BY t.sample_id

-- one average for each part
SELECT t.sample_id, avg(inner_product(layers(t.gradient, 'fc1'), v.gradient)) + avg(inner_product(layers(t.gradient, 'block'), v.gradient))
  + avg(inner_product(t.gradient, layers(v.gradient, 'head')))
FROM train t, validation v GROUP BY t.sample_id

-- summed over the relation of layers
SELECT t.sample_id, sum(inner_product(layers(t.gradient, l.layer), v.gradient)) / 40 FROM train t, validation v, layers l GROUP BY t.sample_id

-- two sub-queries deep
SELECT id, avg(p) FROM (SELECT id, inner_product(g, h) AS p FROM (
  SELECT t.sample_id AS id, t.gradient AS g, v.gradient AS h FROM train t, validation v
)) GROUP BY id

-- LATERAL of single products, averaged outside
SELECT t.sample_id, avg(x.s) FROM train t, LATERAL (SELECT inner_product(t.gradient, v.gradient) AS s FROM validation v) x GROUP BY t.sample_id

-- any_value beside the key
SELECT any_value(t.sample_id), avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY t.sample_id

-- a name of the select list used again
SELECT id, s FROM (
  SELECT t.sample_id AS id, avg(inner_product(t.gradient, v.gradient)) AS s, s * 2 AS twice FROM train t, validation v GROUP BY t.sample_id
)

-- averages of equally large halves
SELECT id, avg(s) FROM (
  SELECT t.sample_id AS id, v.sample_id % 2 AS half, avg(inner_product(t.gradient, v.gradient)) AS s
  FROM train t, validation v GROUP BY ALL
) GROUP BY id

==== ANY COST

-- the average as a window over pairs
SELECT DISTINCT t.sample_id, avg(inner_product(t.gradient, v.gradient)) OVER (PARTITION BY t.sample_id) FROM train t, validation v

-- a FILTER that lets all pass
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FILTER (WHERE v.loss > 0) FROM train t, validation v GROUP BY t.sample_id

-- LEFT JOIN ON true
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t LEFT JOIN validation v ON true GROUP BY t.sample_id

-- lists
SELECT t.sample_id, list_avg(list(inner_product(t.gradient, v.gradient))) FROM train t, validation v GROUP BY t.sample_id
