package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// How many containers there are when the API's latency is measured.
const (
	apiStopped = 1000
	apiRunning = 100
)

// apiClient speaks to an engine without a command line between.
type apiClient struct{ http.Client }

func newAPIClient(host string) *apiClient {
	sock := strings.TrimPrefix(host, "unix://")
	return &apiClient{http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", sock)
	}}}}
}

// call sends a request and reads the whole answer.
func (c *apiClient) call(ctx context.Context, method, path, body string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://engine"+path, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode >= 400 {
		err = fmt.Errorf("%s %s: %s", method, path, b)
	}
	return b, err
}

// populate makes the containers and returns a function that removes them.
func (c *apiClient) populate(ctx context.Context) (clear func() error, err error) {
	each := func(fn func(i int) error) error {
		var wg sync.WaitGroup
		var mu sync.Mutex
		var failed error
		next := make(chan int)
		for range 4 {
			wg.Go(func() {
				for i := range next {
					if err := fn(i); err != nil {
						mu.Lock()
						failed = err
						mu.Unlock()
					}
				}
			})
		}
		for i := range apiStopped + apiRunning {
			next <- i
		}
		close(next)
		wg.Wait()
		return failed
	}
	name := func(i int) string { return fmt.Sprintf("api%d", i) }
	clear = func() error {
		return each(func(i int) error {
			_, err := c.call(ctx, "DELETE", "/containers/"+name(i)+"?force=1&v=1", "")
			return err
		})
	}
	return clear, each(func(i int) error {
		body := fmt.Sprintf(`{"Image":%q,"Cmd":["sleep","1000"],"Env":["A=%d"],"Labels":{"n":"%d"},"ExposedPorts":{"80/tcp":{}}}`, imageRef, i, i)
		if _, err := c.call(ctx, "POST", "/containers/create?name="+name(i), body); err != nil {
			return err
		}
		if i%((apiStopped+apiRunning)/apiRunning) != 0 || i/((apiStopped+apiRunning)/apiRunning) >= apiRunning {
			return nil
		}
		_, err := c.call(ctx, "POST", "/containers/"+name(i)+"/start", "")
		return err
	})
}

// timed adds how long n requests took, and one to warm up.
func (c *apiClient) timed(ctx context.Context, r *row, n int, method string, path func(i int) string) error {
	for i := range n + 1 {
		t := time.Now()
		if _, err := c.call(ctx, method, path(i), ""); err != nil {
			return err
		}
		if i > 0 {
			r.add("servin", float64(time.Since(t).Microseconds())/1e3)
		}
	}
	return nil
}

// api measures the API with many containers. The bars are absolute.
func (b *bench) api() error {
	if !b.only.MatchString("API: ") {
		return nil
	}
	c := newAPIClient(b.e.servHost)
	clear, err := c.populate(b.ctx)
	if err != nil {
		return err
	}
	defer func() { _ = clear() }()
	const with = ", 1,000 stopped and 100 running containers"
	if err := b.row("API: ps -a"+with, "ms", "less", "under 15 ms", "", func(r *row) error {
		return c.timed(b.ctx, r, b.n, "GET", func(int) string { return "/containers/json?all=1" })
	}); err != nil {
		return err
	}
	if err := b.row("API: inspect"+with, "ms", "less", "under 2 ms", "", func(r *row) error {
		return c.timed(b.ctx, r, b.n, "GET", func(i int) string { return fmt.Sprintf("/containers/api%d/json", i%(apiStopped+apiRunning)) })
	}); err != nil {
		return err
	}
	return b.row("API: an event from its moment to the client"+with, "ms", "less", "under 5 ms", "", func(r *row) error {
		return c.events(b.ctx, r, b.n)
	})
}

// events takes the time from the stamp of an event to its arrival.
func (c *apiClient) events(ctx context.Context, r *row, n int) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", "http://engine/events?filters=%7B%22event%22%3A%5B%22rename%22%5D%7D", nil)
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for i := range n + 1 {
		from, to := "api0", "api-renamed"
		if i%2 == 1 {
			from, to = to, from
		}
		if _, err := c.call(ctx, "POST", "/containers/"+from+"/rename?name="+to, ""); err != nil {
			return err
		}
		// It may have come while the answer was read: a lag can only look longer.
		if !lines.Scan() {
			return fmt.Errorf("the events end: %w", lines.Err())
		}
		now := time.Now().UnixNano()
		var e struct{ TimeNano int64 }
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return err
		}
		if i > 0 {
			r.add("servin", float64(now-e.TimeNano)/1e6)
		}
	}
	if n%2 == 0 {
		_, err = c.call(ctx, "POST", "/containers/api-renamed/rename?name=api0", "")
	}
	return err
}
