package client

import (
	"context"
	"errors"
	"io"
	"net"
	"net/url"
	"strconv"

	"github.com/cloudos-io/cloudos/api"
)

// VM speaks to servin-vmd, which owns this user's virtual machine. Its engine is
// reached with a Client for the machine's socket.
type VM struct{ c *Client }

// NewVM returns a client for the control socket of a servin-vmd.
func NewVM(socket string) (*VM, error) {
	c, err := New(Config{Host: "unix://" + socket})
	if err != nil {
		return nil, err
	}
	return &VM{c: c}, nil
}

// Close drops idle connections.
func (v *VM) Close() error { return v.c.Close() }

// Status tells how the machine is; it does not wake it.
func (v *VM) Status(ctx context.Context) (st api.VMStatus, err error) {
	return st, v.c.do(ctx, &request{method: "GET", path: "/v1/status", bare: true}, &st)
}

// Loss tells what a reset destroys, starting the machine to count it.
func (v *VM) Loss(ctx context.Context) (l api.VMLoss, err error) {
	return l, v.c.do(ctx, &request{method: "GET", path: "/v1/loss", bare: true}, &l)
}

// Change changes the configuration.
func (v *VM) Change(ctx context.Context, ch api.VMChange) (out api.VMChanged, err error) {
	return out, v.c.do(ctx, &request{method: "PATCH", path: "/v1/config", json: ch, bare: true}, &out)
}

// Start, Stop, Restart and Reset do what they say and report each step.
func (v *VM) Start(ctx context.Context, each func(api.VMProgress)) error {
	return v.operate(ctx, "start", nil, each)
}

// Stop stops the machine; force pulls its plug.
func (v *VM) Stop(ctx context.Context, force bool, each func(api.VMProgress)) error {
	return v.operate(ctx, "stop", values("force", flag(force)), each)
}

// Restart stops and starts it.
func (v *VM) Restart(ctx context.Context, each func(api.VMProgress)) error {
	return v.operate(ctx, "restart", nil, each)
}

// Reset destroys everything in it.
func (v *VM) Reset(ctx context.Context, each func(api.VMProgress)) error {
	return v.operate(ctx, "reset", nil, each)
}

// Quit ends servin-vmd; the machine goes on, and its ports end.
func (v *VM) Quit(ctx context.Context) error {
	return v.c.do(ctx, &request{method: "POST", path: "/v1/quit", bare: true}, nil)
}

func (v *VM) operate(ctx context.Context, what string, q url.Values, report func(api.VMProgress)) error {
	resp, err := v.c.send(ctx, &request{method: "POST", path: "/v1/" + what, query: q, bare: true})
	if err != nil {
		return err
	}
	defer resp.body.Close()
	done := false
	err = each(resp.body, func(p api.VMProgress) error {
		if p.Error != "" {
			return &Error{Status: p.Status, Message: p.Error}
		}
		done = done || p.Done
		if report != nil {
			report(p)
		}
		return nil
	})
	if err == nil && !done {
		err = ErrConnectionLost
	}
	return err
}

// Logs copies what the machine and servin-vmd wrote: which is console, engine, init or
// vmd. It follows until ctx ends if told so.
func (v *VM) Logs(ctx context.Context, which string, follow bool, lines int, w io.Writer) error {
	resp, err := v.c.send(ctx, &request{method: "GET", path: "/v1/logs", bare: true,
		query: values("which", which, "follow", flag(follow), "lines", strconv.Itoa(lines))})
	if err != nil {
		return err
	}
	defer resp.body.Close()
	_, err = io.Copy(w, resp.body)
	return err
}

// Console is the machine's serial line.
func (v *VM) Console(ctx context.Context) (net.Conn, error) {
	resp, err := v.c.send(ctx, &request{method: "POST", path: "/v1/console", upgrade: true, bare: true})
	if err != nil {
		return nil, err
	}
	if resp.status != 101 {
		resp.body.Close()
		return nil, errors.New("cannot open the console: servin-vmd is of another version")
	}
	return &rawConn{resp.conn}, nil
}

// rawConn reads what was buffered before the stream became raw.
type rawConn struct{ *conn }

func (r *rawConn) Read(p []byte) (int, error) { return r.br.Read(p) }
