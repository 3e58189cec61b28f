-- sample_id, avg: each training sample with the validation samples of another id.

==== ANY COST

-- WHERE
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v WHERE t.sample_id <> v.sample_id GROUP BY t.sample_id

-- ON
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t JOIN validation v ON t.sample_id != v.sample_id GROUP BY t.sample_id

-- correlated
SELECT t.sample_id, (SELECT avg(inner_product(t.gradient, v.gradient)) FROM validation v WHERE v.sample_id <> t.sample_id) FROM train t

-- IS DISTINCT FROM
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v WHERE t.sample_id IS DISTINCT FROM v.sample_id GROUP BY 1
