// Package await lets a program be started before it is known how it is to run: the
// first process of the OS image starts servind so while it still mounts the data disk.
// Both import it. The program finds a pipe at descriptor 3, from which an Order comes;
// a pipe that ends without one ends the program.
package await

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
)

// Order says how to run.
type Order struct {
	// Args are the arguments, Env what is added to the environment.
	Args []string `json:"args"`
	Env  []string `json:"env"`
}

const (
	name = "SERVIND_AWAIT"
	// Env is the variable that makes the program wait.
	Env = name + "=3"
	fd  = 3
	// maxOrder bounds an order.
	maxOrder = 1 << 20
)

// Wait waits for the order where one is to come and returns its arguments, and
// those given otherwise. run is false when there will be none.
func Wait(args []string) (_ []string, run bool, err error) {
	if name+"="+os.Getenv(name) != Env {
		return args, true, nil
	}
	// Not for those that this program starts.
	if err := os.Unsetenv(name); err != nil {
		return nil, false, err
	}
	syscall.CloseOnExec(fd)
	f := os.NewFile(fd, "order")
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxOrder))
	if err != nil {
		return nil, false, fmt.Errorf("cannot read how to run: %w", err)
	}
	if len(b) == 0 {
		return nil, false, nil
	}
	o, err := parse(b)
	if err != nil {
		return nil, false, err
	}
	for _, e := range o.Env {
		k, v, _ := strings.Cut(e, "=")
		if err := os.Setenv(k, v); err != nil {
			return nil, false, err
		}
	}
	return o.Args, true, nil
}

func parse(b []byte) (o Order, err error) {
	if err := json.Unmarshal(b, &o); err != nil {
		return o, fmt.Errorf("cannot read how to run: %w", err)
	}
	return o, nil
}
