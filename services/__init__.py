"""The three services. Each imports from `shared`; none imports another."""
