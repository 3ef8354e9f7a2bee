"""External data: public datasets and a team's own files, mapped to the three datasets."""
