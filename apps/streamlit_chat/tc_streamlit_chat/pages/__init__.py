"""The pages. Streamlit runs `app.py` anew whenever something was clicked."""
