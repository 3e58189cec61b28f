"""What runs inside DuckDB: the kernels over stored factors, and the SQL functions, one a file."""
