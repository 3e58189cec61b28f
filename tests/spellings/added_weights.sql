-- sample_id, avg: weighted by the sum of both losses.

==== CHEAP

-- in brackets
SELECT t.sample_id, avg((t.loss + v.loss) * inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY t.sample_id

-- multiplied out
SELECT t.sample_id, avg(t.loss * inner_product(t.gradient, v.gradient) + v.loss * inner_product(t.gradient, v.gradient))
FROM train t, validation v GROUP BY t.sample_id

-- two averages
SELECT t.sample_id, avg(t.loss * inner_product(t.gradient, v.gradient)) + avg(v.loss * inner_product(t.gradient, v.gradient))
FROM train t, validation v GROUP BY t.sample_id

-- minus minus
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient) * (t.loss - -v.loss)) FROM train t, validation v GROUP BY t.sample_id
