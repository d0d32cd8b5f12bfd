from bkdattr.cli import main

main()
