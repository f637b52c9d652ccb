package client

import (
	"context"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"time"
)

// sshConn is a connection through the standard streams of an ssh process that
// runs `servin system dial-stdio` on the other side.
type sshConn struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *os.File
	host string
}

func dialSSH(ctx context.Context, addr string) (net.Conn, error) {
	u, err := url.Parse("ssh://" + addr)
	if err != nil {
		return nil, err
	}
	args := []string{"-o", "ConnectTimeout=30", "-T"}
	if u.User != nil {
		args = append(args, "-l", u.User.Username())
	}
	if p := u.Port(); p != "" {
		args = append(args, "-p", p)
	}
	args = append(args, "--", u.Hostname(), "servin", "system", "dial-stdio")
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("ssh", args...)
	cmd.Stdout, cmd.Stderr = w, os.Stderr
	in, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	w.Close()
	if err != nil {
		r.Close()
		return nil, err
	}
	return &sshConn{cmd: cmd, in: in, out: r, host: addr}, nil
}

func (s *sshConn) Read(p []byte) (int, error)  { return s.out.Read(p) }
func (s *sshConn) Write(p []byte) (int, error) { return s.in.Write(p) }
func (s *sshConn) CloseWrite() error           { return s.in.Close() }

func (s *sshConn) Close() error {
	s.in.Close()
	err := s.out.Close()
	s.cmd.Process.Kill()
	s.cmd.Wait()
	return err
}

func (s *sshConn) LocalAddr() net.Addr                { return &net.UnixAddr{Name: "ssh", Net: "ssh"} }
func (s *sshConn) RemoteAddr() net.Addr               { return &net.UnixAddr{Name: s.host, Net: "ssh"} }
func (s *sshConn) SetDeadline(t time.Time) error      { return s.out.SetDeadline(t) }
func (s *sshConn) SetReadDeadline(t time.Time) error  { return s.out.SetReadDeadline(t) }
func (s *sshConn) SetWriteDeadline(t time.Time) error { return nil }
