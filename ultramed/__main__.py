from ultramed.cli import main

main()
