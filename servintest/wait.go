package servintest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
)

// Strategy says when a container is ready.
type Strategy interface {
	wait(ctx context.Context, c *Container) error
}

// check is a strategy that asks again and again. A container that ends is never
// ready, unless that is what is waited for.
type check struct {
	what string
	// ok tells whether it is ready; its error is the reason why not yet.
	ok func(ctx context.Context, c *Container) (bool, error)
	// ended: the container may have ended.
	ended bool
}

func (k check) wait(ctx context.Context, c *Container) error {
	var last error
	for d := 5 * time.Millisecond; ; d = min(d*3/2, 250*time.Millisecond) {
		// First whether it runs: what it wrote before its end counts.
		in, err := c.Inspect(ctx)
		if err == nil {
			var ready bool
			if ready, err = k.ok(ctx, c); ready {
				return nil
			}
			if st := in.State; !k.ended && st != nil && (st.Status == container.StateExited || st.Status == container.StateDead) {
				return fmt.Errorf("%w with code %d before %s; its log ends with:\n%s", errEnded, st.ExitCode, k.what, c.tail(ctx))
			}
		}
		if err != nil && ctx.Err() == nil {
			last = err
		}
		if perr := pause(ctx, d); perr != nil {
			text := ""
			if last != nil {
				text = ": " + last.Error()
			}
			// The log is read although the time is over.
			tctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			return fmt.Errorf("not in time: waited for %s%s; its log ends with:\n%s", k.what, text, c.tail(tctx))
		}
	}
}

// ForLog waits until the log holds the text.
func ForLog(text string) Strategy { return ForLogTimes(text, 1) }

// ForLogTimes waits until the log holds the text so many times: databases that
// start twice say they are ready twice.
func ForLogTimes(text string, n int) Strategy {
	return check{what: fmt.Sprintf("%q in its log", text), ok: func(ctx context.Context, c *Container) (bool, error) {
		log, err := c.Logs(ctx)
		return strings.Count(log, text) >= n, err
	}}
}

// ForPort waits until a published TCP port accepts connections. One that is
// accepted and closed at once does not count: that is how a port is answered
// while nobody in the container listens yet.
func ForPort(port string) Strategy {
	return check{what: "port " + port, ok: func(ctx context.Context, c *Container) (bool, error) {
		n, err := c.port(ctx, port)
		if err != nil {
			return false, err
		}
		var d net.Dialer
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		k, err := d.DialContext(ctx, "tcp", net.JoinHostPort(c.Host(), strconv.Itoa(n)))
		if err != nil {
			return false, err
		}
		defer k.Close()
		if err := k.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
			return false, err
		}
		var b [1]byte
		_, err = k.Read(b[:])
		var ne net.Error
		return err == nil || errors.As(err, &ne) && ne.Timeout(), err
	}}
}

// ForHTTP waits until a GET of the path on a published port is answered with a
// status below 400.
func ForHTTP(port, path string) Strategy {
	return check{what: "an answer to GET " + path, ok: func(ctx context.Context, c *Container) (bool, error) {
		n, err := c.port(ctx, port)
		if err != nil {
			return false, err
		}
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(c.Host(), strconv.Itoa(n))+path, nil)
		if err != nil {
			return false, err
		}
		hc := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		resp, err := hc.Do(req)
		if err != nil {
			return false, err
		}
		resp.Body.Close()
		if resp.StatusCode >= 400 {
			return false, fmt.Errorf("the answer's status is %s", resp.Status)
		}
		return true, nil
	}}
}

// ForExec waits until a command in the container succeeds.
func ForExec(cmd ...string) Strategy {
	return check{what: "the success of " + strings.Join(cmd, " "), ok: func(ctx context.Context, c *Container) (bool, error) {
		r, err := c.Exec(ctx, cmd...)
		if err != nil {
			return false, err
		}
		if r.ExitCode != 0 {
			return false, fmt.Errorf("exit code %d: %s", r.ExitCode, strings.TrimSpace(r.Stderr))
		}
		return true, nil
	}}
}

// ForHealthy waits until the container's own health check says so.
func ForHealthy() Strategy {
	return check{what: "its health", ok: func(ctx context.Context, c *Container) (bool, error) {
		in, err := c.Inspect(ctx)
		if err != nil || in.State == nil {
			return false, err
		}
		if in.State.Health == nil {
			return false, errors.New("it has no health check")
		}
		return in.State.Health.Status == container.Healthy, nil
	}}
}

// ForExit waits until the container has ended with code 0.
func ForExit() Strategy {
	return check{what: "its end", ended: true, ok: func(ctx context.Context, c *Container) (bool, error) {
		in, err := c.Inspect(ctx)
		if err != nil || in.State == nil || in.State.Status != container.StateExited {
			return false, err
		}
		if in.State.ExitCode != 0 {
			return false, fmt.Errorf("it ended with %d", in.State.ExitCode)
		}
		return true, nil
	}}
}

// all is several strategies.
type all []Strategy

func (a all) wait(ctx context.Context, c *Container) error {
	for _, s := range a {
		if err := s.wait(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// All waits for each in turn.
func All(s ...Strategy) Strategy { return all(s) }
