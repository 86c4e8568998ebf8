"""Start-up kits of a consortium, and the doctor that looks at one: what runs around a study."""
