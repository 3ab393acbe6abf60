"""Rows of tables: the type, its ids, and every read and write of rows."""
