-- sample_id, avg: cosine similarities with validation.

==== CHEAP

-- comma
SELECT t.sample_id, avg(cosine_similarity(t.gradient, v.gradient)) FROM train t, validation v GROUP BY t.sample_id

-- the other way round
SELECT t.sample_id, avg(cosine_similarity(v.gradient, t.gradient)) AS alike FROM validation v JOIN train t ON true GROUP BY ALL ORDER BY alike

-- pairs in a CTE
WITH pairs AS (SELECT t.sample_id AS id, cosine_similarity(t.gradient, v.gradient) AS s FROM train t, validation v)
SELECT id, avg(s) FROM pairs GROUP BY id

-- correlated
SELECT t.sample_id, (SELECT avg(cosine_similarity(t.gradient, v.gradient)) FROM validation v) FROM train t

-- spelled out
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient) / (norm(t.gradient) * norm(v.gradient))) FROM train t, validation v GROUP BY t.sample_id

-- spelled out, one side at a time
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient) / norm(v.gradient)) / norm(t.gradient) FROM train t, validation v GROUP BY t.sample_id, t.gradient

-- an average of unit vectors
SELECT sample_id, inner_product(gradient, (SELECT avg(gradient / norm(gradient)) FROM validation)) / norm(gradient) FROM train
