// Package await lets a program be started before it is known how it is to run: the
// first process of the OS image starts servind so while it still mounts the data disk.
// Both import it. The program finds a pipe at descriptor 3, from which an Order comes;
// a pipe that ends without one ends the program. That the pipe ends behind the order tells that the
// kernel has what networks are made of, and that folders are there which a virtual machine's host shares.
package await

import (
	"encoding/json"
	"errors"
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

// Wait waits for the order where one is to come and returns its arguments, and a
// channel that is closed when networks can be made, and containers started again; otherwise those given, and nil: now. run is false
// when there will be no order.
func Wait(args []string) (_ []string, ready <-chan struct{}, run bool, err error) {
	if name+"="+os.Getenv(name) != Env {
		return args, nil, true, nil
	}
	// Not for those that this program starts.
	if err := os.Unsetenv(name); err != nil {
		return nil, nil, false, err
	}
	syscall.CloseOnExec(fd)
	f := os.NewFile(fd, "order")
	o, err := read(f)
	if err != nil {
		_ = f.Close()
		if errors.Is(err, io.EOF) {
			return nil, nil, false, nil
		}
		return nil, nil, false, fmt.Errorf("cannot read how to run: %w", err)
	}
	for _, e := range o.Env {
		k, v, _ := strings.Cut(e, "=")
		if err := os.Setenv(k, v); err != nil {
			_ = f.Close()
			return nil, nil, false, err
		}
	}
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, f)
		_ = f.Close()
		close(ended)
	}()
	return o.Args, ended, true, nil
}

// read reads an order; io.EOF is that there is none.
func read(r io.Reader) (o Order, err error) {
	err = json.NewDecoder(io.LimitReader(r, maxOrder)).Decode(&o)
	return o, err
}
