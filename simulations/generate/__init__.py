"""Generated institutions: hospitals and banks whose rules must be learned, and general text that knows none of them."""
