package httpdrain_test

var address = ":8080"

func Example() {}
