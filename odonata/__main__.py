from odonata.door import main

if __name__ == "__main__":
    main()
