-- sample_id, avg: an empty query side leaves no groups.

==== CHEAP

-- WHERE
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v WHERE v.loss > 99 GROUP BY t.sample_id

-- false
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v WHERE false GROUP BY t.sample_id

-- in a sub-query
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, (FROM validation WHERE label > 99) v GROUP BY ALL

-- pairs outside
SELECT id, avg(s) FROM (SELECT t.sample_id AS id, v.loss, inner_product(t.gradient, v.gradient) AS s FROM train t, validation v) WHERE loss > 99 GROUP BY id
