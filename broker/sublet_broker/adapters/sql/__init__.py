"""SQLite and PostgreSQL through SQLModel: tables, codec, engine, migrations."""
