"""Parameters from elsewhere and for others: another run's, and Hugging Face folders, read and written."""
