-- sample_id, sum(DISTINCT): equal inner products count once.

==== ANY COST

-- sum(DISTINCT)
SELECT t.sample_id, sum(DISTINCT inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY t.sample_id

-- distinct pairs inside
SELECT id, sum(s) FROM (SELECT DISTINCT t.sample_id AS id, inner_product(t.gradient, v.gradient) AS s FROM train t, validation v) GROUP BY id
