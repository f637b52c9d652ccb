package alert

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// attempts are made for a webhook before a notice is given up.
const attempts = 3

// maxOutput is how much of a command's output is kept for the log.
const maxOutput = 2048

// perform carries an action out; it returns when that succeeded or is given up.
func perform(ctx context.Context, a Action, n Notice) error {
	body, err := json.Marshal(n)
	if err != nil {
		return err
	}
	if a.Webhook == "" {
		return command(ctx, a, n, body)
	}
	for i := 1; ; i++ {
		err := post(ctx, a, body)
		var final *refused
		if err == nil || i == attempts || errors.As(err, &final) && final.status < 500 && final.status != http.StatusTooManyRequests {
			return err
		}
		select {
		case <-time.After(time.Duration(i) * time.Second):
		case <-ctx.Done():
			return err
		}
	}
}

type refused struct{ status int }

func (r *refused) Error() string { return fmt.Sprintf("it answered %d", r.status) }

func post(ctx context.Context, a Action, body []byte) error {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(a.Timeout))
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, a.Webhook, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "servin-alerts/1")
	for k, v := range a.Headers {
		req.Header.Set(k, v)
	}
	c := http.Client{
		// What one address is trusted with, another one that it names is not.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport:     &http.Transport{Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true, ForceAttemptHTTP2: true},
	}
	resp, err := c.Do(req)
	if err != nil {
		return withoutURL(err)
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10))
	if resp.StatusCode/100 != 2 {
		return &refused{resp.StatusCode}
	}
	return nil
}

// withoutURL drops the address, which may hold a token, from what is logged.
func withoutURL(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		return u.Err
	}
	return err
}

// command runs a program as the action's user, in a process group of its own
// that ends with it.
func command(ctx context.Context, a Action, n Notice, body []byte) error {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(a.Timeout))
	defer cancel()
	cmd := exec.CommandContext(ctx, a.Command[0], a.Command[1:]...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8", "SERVIN_ALERT_RULE=" + n.Rule, "SERVIN_ALERT_STATUS=" + n.Status}
	if n.Container != nil {
		cmd.Env = append(cmd.Env, "SERVIN_ALERT_CONTAINER="+n.Container.Name, "SERVIN_ALERT_CONTAINER_ID="+n.Container.ID)
	}
	cmd.Stdin = bytes.NewReader(body)
	out := &head{max: maxOutput}
	cmd.Stdout, cmd.Stderr = out, out
	// The death signal comes when this thread ends, so it must not.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if os.Getuid() == 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: a.uid, Gid: a.gid, Groups: []uint32{}}
	}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	if cmd.Process != nil {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // what it left behind
	}
	if ctx.Err() != nil {
		return fmt.Errorf("it did not end within %s", time.Duration(a.Timeout))
	}
	if err != nil && len(out.b) > 0 {
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(out.b))
	}
	return err
}

// head keeps the beginning of what is written.
type head struct {
	b   []byte
	max int
}

func (h *head) Write(p []byte) (int, error) {
	h.b = append(h.b, p[:min(len(p), h.max-len(h.b))]...)
	return len(p), nil
}
