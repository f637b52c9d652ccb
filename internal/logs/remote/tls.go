package remote

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"time"
)

// refusalWait is how long a receiver has to refuse us. In TLS 1.3 the client is
// done before the other side has looked at its certificate: what is sent at once is
// taken by the system there, and lost with the alert that follows.
const refusalWait = 500 * time.Millisecond

// secure makes a connection one of TLS. It closes below if it cannot.
func secure(ctx context.Context, below net.Conn, conf *tls.Config, timeout time.Duration) (*tls.Conn, error) {
	t := tls.Client(below, conf)
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	err := t.HandshakeContext(ctx)
	if err == nil && t.ConnectionState().Version >= tls.VersionTLS13 {
		err = refused(t)
	}
	if err != nil {
		below.Close()
		return nil, err
	}
	return t, nil
}

// refused waits for a refusal. Receivers of logs say nothing by themselves.
func refused(t *tls.Conn) error {
	_ = t.SetReadDeadline(time.Now().Add(refusalWait))
	_, err := t.Read(make([]byte, 1))
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return t.SetReadDeadline(time.Time{})
	case err == nil:
		return errors.New("the other side speaks first: it is no receiver of logs")
	}
	return fmt.Errorf("the other side refuses the connection: %w", err)
}
