"""The data checks: a tolerant reader, Great Expectations suites as code, leakage, Data Docs, any folder."""
