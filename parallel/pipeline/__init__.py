"""Pipeline schedules as plain data: filled, proved, timed, drawn and run from one table."""
