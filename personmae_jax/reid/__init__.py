"""Re-identification: data sets with identities and cameras, features, retrieval."""
