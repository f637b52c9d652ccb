package client

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
)

// tlsConfig reads the material at first use.
func (c *Client) tlsConfig() (*tls.Config, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.tlsc != nil {
		return c.tlsc, nil
	}
	host, _, _ := net.SplitHostPort(c.addr)
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: host, InsecureSkipVerify: c.tls.SkipVerify}
	if c.tls.ServerName != "" {
		cfg.ServerName = c.tls.ServerName
	}
	if c.tls.CA != "" {
		pem, err := os.ReadFile(c.tls.CA)
		if err != nil {
			return nil, fmt.Errorf("cannot read the authority's certificate: %w", err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("cannot read the authority's certificate: %s holds none in PEM format", c.tls.CA)
		}
	}
	if c.tls.Cert != "" || c.tls.Key != "" {
		pair, err := tls.LoadX509KeyPair(c.tls.Cert, c.tls.Key)
		if err != nil {
			return nil, fmt.Errorf("cannot read the client certificate: %w", err)
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	c.tlsc = cfg
	return cfg, nil
}
