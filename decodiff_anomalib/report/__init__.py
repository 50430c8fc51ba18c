"""The report of a test or a prediction: one HTML page that needs nothing else, and the data it is made from."""
