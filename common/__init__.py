"""Neither side: adapters, models, text, metrics, aggregation methods, wire."""
