"""Other people's data: public preference sets and a team's own files, mapped into the three datasets."""
