-- sample_id, max: the largest inner product with any validation sample.

==== ANY COST

-- max
SELECT t.sample_id, max(inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY t.sample_id

-- correlated max
SELECT t.sample_id, (SELECT max(inner_product(t.gradient, v.gradient)) FROM validation v) FROM train t

-- max beside an average
SELECT id, m FROM (
  SELECT t.sample_id AS id, max(inner_product(t.gradient, v.gradient)) AS m, avg(inner_product(t.gradient, v.gradient)) AS a FROM train t, validation v GROUP BY ALL
)

-- row_number
SELECT id, s FROM (SELECT t.sample_id AS id, inner_product(t.gradient, v.gradient) AS s FROM train t, validation v)
QUALIFY row_number() OVER (PARTITION BY id ORDER BY s DESC) = 1
