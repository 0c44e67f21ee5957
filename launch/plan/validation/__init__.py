"""`weft plan --validate FILE.csv`: the planner's predictions beside runs that others have published."""
