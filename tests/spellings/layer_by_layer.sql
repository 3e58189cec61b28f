-- layer, avg: over all pairs.

==== CHEAP

-- joined with the relation of layers
SELECT l.layer, avg(inner_product(layers(t.gradient, l.layer), v.gradient)) FROM train t, validation v, layers l GROUP BY l.layer

-- restricted on the query side
SELECT l.layer, avg(inner_product(t.gradient, layers(v.gradient, l.layer))) FROM train t CROSS JOIN validation v CROSS JOIN layers l GROUP BY 1

-- restricted on both sides
SELECT layer, avg(inner_product(layers(t.gradient, layer), layers(v.gradient, layer))) FROM layers, train t, validation v GROUP BY layer

-- joined with a relation of which DuckDB guesses the rows
SELECT l.name, avg(inner_product(t.gradient, layers(v.gradient, l.name))) FROM train t, validation v, (SELECT DISTINCT layer AS name FROM layers) l GROUP BY l.name

-- with the average
SELECT l.layer, avg(inner_product(layers(t.gradient, l.layer), (SELECT avg(gradient) FROM validation))) FROM train t, layers l GROUP BY l.layer

-- one branch for each
SELECT 'fc1', avg(inner_product(layers(t.gradient, 'fc1'), v.gradient)) FROM train t, validation v
UNION ALL SELECT 'block.words', avg(inner_product(layers(t.gradient, 'block.words'), v.gradient)) FROM train t, validation v
UNION ALL SELECT 'head', avg(inner_product(layers(t.gradient, 'head'), v.gradient)) FROM train t, validation v
