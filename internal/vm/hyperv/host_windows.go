package hyperv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"

	"github.com/Microsoft/go-winio"
	"github.com/Microsoft/go-winio/pkg/guid"
)

// ThisHost is the computer that we run on.
func ThisHost() Config { return Config{Run: powershell, Dial: dial} }

// powershell runs a script given on standard input.
func powershell(ctx context.Context, script string, env map[string]string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "powershell.exe", "-NoProfile", "-NonInteractive", "-ExecutionPolicy", "Bypass", "-Command", script)
	cmd.Env = os.Environ()
	for k, v := range env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		if text := strings.TrimSpace(said.String()); text != "" {
			first, _, _ := strings.Cut(text, "\n")
			return nil, errors.New(strings.TrimSpace(first))
		}
		return nil, fmt.Errorf("cannot run powershell: %w", err)
	}
	return out, nil
}

func dial(ctx context.Context, id string, port uint32) (net.Conn, error) {
	machine, err := guid.FromString(id)
	if err != nil {
		return nil, fmt.Errorf("cannot read the machine's id: %w", err)
	}
	return winio.Dial(ctx, &winio.HvsockAddr{VMID: machine, ServiceID: winio.VsockServiceID(port)})
}
